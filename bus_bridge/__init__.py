"""A voice turn, from socket to messagebus and back."""
