"""The report on experiments: figures from rows, and one document of all, as HTML or Markdown; nothing is run."""
