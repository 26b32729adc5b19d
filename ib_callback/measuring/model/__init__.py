"""Everything that touches the measured model: finding its layers, running it, hooks, and leaving no trace."""
