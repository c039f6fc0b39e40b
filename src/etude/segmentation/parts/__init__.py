"""What the methods of segmentation share: pictures with masks, crops, scores, overlap tiles, overlays."""
