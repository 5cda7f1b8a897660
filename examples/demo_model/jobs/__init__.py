"""What the models are asked: one file a job, `JOBS` by name."""

from demo_model.jobs import grid, pairs
from demo_model.jobs.job import Asked, Job

JOBS: dict[str, Job] = {job.name: job for job in (grid.JOB, pairs.JOB)}
__all__ = ["JOBS", "Asked", "Job"]
