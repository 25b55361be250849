"""The parts of tools/demo_app.py: held-out pairs, what is asked of the model, pictures of it, and the page itself."""
