"""The routes, one module for each kind; each adds its own with `add_routes(app, service)`."""
