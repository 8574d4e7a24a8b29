"""Config files: each has get_config(variant) for --config=FILE:variant."""
