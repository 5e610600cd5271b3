"""What users install, tried in clean environments: `make packages`."""
