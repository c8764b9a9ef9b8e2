"""What runs gave, for people and machines: progress, tables, JSON, one HTML page, comparison."""
