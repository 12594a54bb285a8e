"""All devices on one forward: every block computed by everybody, each on its share of the tokens."""
