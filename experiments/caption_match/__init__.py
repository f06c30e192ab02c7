"""How often generated pictures show what their prompts say."""
