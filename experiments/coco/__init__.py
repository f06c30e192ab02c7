"""The MS-COCO protocol: from a bundle to a table of FID and caption loss."""
