"""What people see: metrics, tables, figures, status."""
