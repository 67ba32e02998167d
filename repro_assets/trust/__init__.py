"""Pure trust code: canonical JSON, blobs, environment, statements, signatures, certificates. No Dagster, no servers."""
