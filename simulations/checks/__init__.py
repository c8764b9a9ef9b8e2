"""What must hold in a run: always (`safety`), in the end (`liveness`), by the file."""
