"""What is measured, and how. Each module's docstring says its command; results are committed beside
it as JSON."""
