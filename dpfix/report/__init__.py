"""What is told: findings, the report, the privacy statement. Data only."""
