"""Parts of a server that answers requests with text as it is drawn."""
