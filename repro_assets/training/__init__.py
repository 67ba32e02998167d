"""The program that trains on the GPU nodes. Imports torch and transformers, never Dagster, and needs a blob store and events only."""
