"""From a run's results to text, Markdown, figures and verdicts."""
