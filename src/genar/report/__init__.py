"""Pictures and pages made of predictions."""
