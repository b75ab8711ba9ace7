"""Evaluate trained models: tasks, runs, scores, metrics, baselines, figures, report."""
