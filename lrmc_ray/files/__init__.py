"""The files that a run leaves and reads: manifests, JSON lines, metrics, object stores."""
