"""Watching a system: rules and alerts for Prometheus, a dashboard for Grafana, indicators and their targets."""
