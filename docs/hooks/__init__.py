"""What the pages call while the site is built: pictures, measured figures, sources, planted bugs."""
