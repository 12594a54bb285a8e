"""Where each block's weights live: loading to their homes, fetching, switching experts, releasing."""
