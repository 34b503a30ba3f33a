"""The OpenAI Realtime protocol as a pure codec onto the session's events."""
