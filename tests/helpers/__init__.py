"""What tests of several rooms use: servers, clusters, a browser, toy sweeps."""
