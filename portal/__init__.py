"""The doors of the control plane: JSON API, channel listener, and a node's start-up."""
