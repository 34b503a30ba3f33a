"""Skills that ship with AgentVoiceBox, one folder each."""
