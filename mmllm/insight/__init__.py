"""What goes on inside a model, over text and all media at once."""
