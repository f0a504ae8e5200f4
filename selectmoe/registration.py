"""Where earlier versions had `register_select_moe`, which `selectmoe` itself exports."""

from selectmoe.model.quiet_loading import register_select_moe as register_select_moe
