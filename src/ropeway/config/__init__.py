"""params.yaml: its schema, reading it into a frozen typed `Profile`, explaining its faults, editing it."""
