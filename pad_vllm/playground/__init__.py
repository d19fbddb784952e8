"""A page to try guidance with, beside any server that runs the plugin."""
