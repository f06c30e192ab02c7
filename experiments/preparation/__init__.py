"""What preparing thirty million pairs takes."""
