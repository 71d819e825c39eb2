"""What every process needs: errors, workspace paths, manifests, locks, supervision, devices."""
