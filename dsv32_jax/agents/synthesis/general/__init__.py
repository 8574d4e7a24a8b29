"""General agents: databases behind tools, hard to solve, easy to verify."""
