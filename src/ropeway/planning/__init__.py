"""What a run will need before it starts: memory, disk, hours. Closed forms; no model is loaded."""
