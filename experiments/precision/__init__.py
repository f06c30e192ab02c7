"""float32, bfloat16 and int8 matrices on the bundle that ships."""
