"""The libraries that bnfast is compared with, and bnfast itself, one file each."""
