"""What touches the model that is measured: finding its layers, running it, hooks, and leaving no trace."""
