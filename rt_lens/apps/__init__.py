"""Apps: the report, the dashboard and the command line. They ask the rooms below and compute nothing themselves."""
