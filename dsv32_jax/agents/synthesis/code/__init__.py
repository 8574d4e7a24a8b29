"""Code tasks from issues and patches: mined, filtered, built, validated."""
