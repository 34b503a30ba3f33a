"""Settings, error vocabulary, logging, and what a cell's OVOS is configured with. Imports nothing of ours."""
