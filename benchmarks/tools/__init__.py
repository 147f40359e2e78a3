"""Apart from the suites: measuring, comparing and repeating reports, writing synthetic checkpoints and pages."""
