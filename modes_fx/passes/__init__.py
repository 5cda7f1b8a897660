"""Graph passes: matchers that find a routing site, rewrites that change it, and the driver that records each site's fate."""
