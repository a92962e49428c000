"""What the host, its processes and its folders need from us."""
