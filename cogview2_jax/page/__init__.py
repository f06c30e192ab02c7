"""The web page of `cogview2 serve`."""
