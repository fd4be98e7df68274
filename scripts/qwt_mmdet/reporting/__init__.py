"""Tables and the report: what the numbers of a run say."""
