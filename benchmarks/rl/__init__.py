"""What online RL with dense rewards buys on the calculator tape."""
