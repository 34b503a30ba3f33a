"""Speech engines and in-cell plugins, each loadable by a stock OVOS; no database, no server packages."""
