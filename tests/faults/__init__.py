"""Commands that are killed at random moments, and must end as if they had not been: ``python -m tests.faults``."""
