"""What a person looks at: measurements as one HTML file that needs nothing else."""
