"""What a model has and what skipping costs and gains: inspection, comparison, benchmarks, the demo, and their pages."""
